"""One generated function for a whole decoder: what it computes, when threads meet, its source, and how it is called."""
