"""Official checkpoint folders: recognised, read natively, written back."""
