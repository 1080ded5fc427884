"""Distillation losses: how far the student is from the teacher."""
