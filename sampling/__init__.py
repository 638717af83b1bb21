"""Floor 5: sample.py's command line, and how the pictures that it makes are named and remember
their making. How they are made is in controlnet/sampling.py."""
