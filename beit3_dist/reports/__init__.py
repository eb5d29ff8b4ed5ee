"""What runs have learnt, for people: numbers, a picture, a page."""
