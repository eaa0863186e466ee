"""Many servers as one: replicas behind a front, which routes requests and answers control calls for all of them."""
