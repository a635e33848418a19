"""What to quantize and how: number formats, schemes, recipes and patterns. Nothing here imports
torch.
"""
