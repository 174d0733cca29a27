"""What a run is: on disk, on its devices, and among the jobs of a sweep."""
