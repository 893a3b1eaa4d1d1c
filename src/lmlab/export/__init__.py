"""What makes a trained model travel: plain directories, certificates, model cards, other programs' formats."""
