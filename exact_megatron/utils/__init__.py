"""What several rooms need and that says nothing of the method."""
