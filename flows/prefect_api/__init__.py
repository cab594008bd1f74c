"""Talking to Prefect's server and waiting for it: events, retries of what is away, a step's log and bar on its pages.

May be imported from here: anything. Never comes in: what an event means to Enginery.
"""
