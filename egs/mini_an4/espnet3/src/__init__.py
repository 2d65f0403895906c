"""What the configurations of this recipe name by `src.`"""
