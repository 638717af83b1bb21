"""Floor 0: what command lines and files share. Knows nothing of diffusion, imports no room."""
