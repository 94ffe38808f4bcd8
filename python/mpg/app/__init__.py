"""What people run: the `mpg` command."""
