"""What the device does to photos before the network sees them: crops and augmentation."""
