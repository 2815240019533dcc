"""What says where a thing comes from: pictures, shard folders, model folders."""
