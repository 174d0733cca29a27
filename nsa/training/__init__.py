"""What only training needs: the part of `nsa` that knows Lightning."""
