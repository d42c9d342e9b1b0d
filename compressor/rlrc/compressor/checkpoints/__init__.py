"""Checkpoint folders of other projects: recognise them, read them without their code, write policies back."""
