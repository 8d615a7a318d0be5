"""The pretraining command: LightningCLI, its callbacks, and what a run folder holds."""
