"""What training and evaluation run on: devices, sharded weights, the moving average, and the record of it all."""
