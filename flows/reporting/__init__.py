"""What people read: tables, the terminal's bars, the HTML report with its charts, what an artifact is.

May be imported from here: anything. Never comes in: decisions; this room is told what happened and shows it.
"""
