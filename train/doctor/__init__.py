"""`itprune doctor CONFIG`: what a recipe would do here, told without training."""
