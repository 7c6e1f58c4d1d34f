"""Training with the pruner in the forward pass: recipes, data, the model with LoRA, the loop.

Nothing here ships in the wheel; `launch/train.py` runs it from a checkout.
"""
