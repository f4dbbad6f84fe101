"""The models: ViT, Q-Former, region tokens, and the students and critics made of them."""
