"""What is known of a user's model without a program: copies, blocks, heads, pieces of parameters, what a trace must leave alone."""
