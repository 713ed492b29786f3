"""Training matched twins: FP16, BitNet and BitNet b1.58 from one recipe."""
