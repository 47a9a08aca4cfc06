"""The row-count study: which numbers of rows in a forward pass change the bits of a row."""
