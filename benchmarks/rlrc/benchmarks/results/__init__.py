"""Result files, the description of the machine, and statistics."""
