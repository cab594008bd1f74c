"""One face over every backend that answers."""
