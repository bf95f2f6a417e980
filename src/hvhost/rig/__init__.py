"""A KVM host in software (QEMU TCG with SVM) for computers without hardware virtualization."""
