"""Less memory: pages given back, what waits on disk, state that a killed stage goes on from, imports left out.

May be imported from here: anything. Never comes in: what is kept, and why.
"""
