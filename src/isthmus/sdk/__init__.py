"""What users import. Its public names are those of `isthmus`; everything here is reached through them."""
