"""Keys, values and the closed form: which weights hold a fact, and what they shall hold instead (Stage II)."""
