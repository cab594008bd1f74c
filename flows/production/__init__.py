"""A team's Prefect: deployments, pools, automations, and the deployments behind the buttons promote, roll back, sweep.

May be imported from here: `deploy`, `pools`, `variables`, for `flows.commands`; Prefect imports the flows of `buttons`
by name. Never comes in: anything that the embedded default needs.
"""
