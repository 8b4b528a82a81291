"""Keys, values and the closed form: which weights hold a fact, and what they are to hold instead (Stage II)."""
