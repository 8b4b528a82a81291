"""Unlearning methods: one short file each, all behind one contract."""
