"""Training on demonstrations: SFT, distillation, losses, LoRA, batches, several processes, saved runs."""
