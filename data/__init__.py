"""Floor 1: data sets, pictures, annotators, how well pictures obey conditions. No networks."""
