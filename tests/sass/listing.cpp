// The file with all kernels, which build.py names, inside of the library.
asm(".section .rodata\n"
    ".hidden sass_listing\n.global sass_listing\nsass_listing:\n"
    ".incbin \"" SASS_LISTING "\"\n"
    ".hidden sass_listing_end\n.global sass_listing_end\nsass_listing_end:\n"
    ".previous\n");
