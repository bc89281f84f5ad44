"""What tests share, by what is tested; at the top what is needed all over."""
