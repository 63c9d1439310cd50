"""Read and check the flags that several commands share."""
