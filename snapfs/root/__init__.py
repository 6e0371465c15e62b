"""The directories of one root, and what the kernel has mounted of them."""
