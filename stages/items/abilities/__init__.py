"""The set of items that ships: tables of public facts, written for this project, and what makes items of them.

A file a family of abilities. May be imported from here: `shipped`, by the stage. Never comes in: a file to read, a
network, chance, and what depends on the machine, its language or the day.
"""
