"""How the embedded model was made: `python -m research.demo_model.train`."""
