"""What only a GPU can show, measured in one command of a few minutes: `python -m simulations.gpu` (docs/gpu.md)."""
