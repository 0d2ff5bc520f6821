"""What the lines of research share; imports none of them."""
