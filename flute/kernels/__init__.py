"""The operator y = x . W^T over codes, scales and a table, and the backends that run it."""
