"""One file an operation: its cases, their inputs, and the float64 truth they are gated on."""
