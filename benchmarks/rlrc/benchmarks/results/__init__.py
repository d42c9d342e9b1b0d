"""Result files, the machine they are of, and their statistics."""
