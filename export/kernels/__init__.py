"""The projection kernel: its source in Triton, and its compilation ahead of time."""
