"""What Ray has, who gets it, how far it is, and how it fails."""
