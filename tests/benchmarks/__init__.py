"""`make bench`: every technique on one model, beside any peer that is installed; same text, same run."""
