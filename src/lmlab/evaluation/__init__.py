"""How good a model is: metrics of generated text."""
