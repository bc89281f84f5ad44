// SEGMENTS matrices of FORMATS formats in one launch, for kernels that take each matrix as parameters of their own.
//
// The kernel file defines SEGMENT_PARAMETERS(n), the parameters of matrix n, each name with n behind it, and a comma.

#if SEGMENTS == 1
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0)
#define ALL_OF(name) {name##0}
#elif SEGMENTS == 2
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1)
#define ALL_OF(name) {name##0, name##1}
#elif SEGMENTS == 3
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1) SEGMENT_PARAMETERS(2)
#define ALL_OF(name) {name##0, name##1, name##2}
#else
#define ALL_SEGMENTS SEGMENT_PARAMETERS(0) SEGMENT_PARAMETERS(1) SEGMENT_PARAMETERS(2) SEGMENT_PARAMETERS(3)
#define ALL_OF(name) {name##0, name##1, name##2, name##3}
#endif

// CALL(F) for the format of that number, one copy of the code for each.
#if FORMATS == 1
#define FOR_FORMAT(format, CALL) CALL(FORMAT0);
#elif FORMATS == 2
#define FOR_FORMAT(format, CALL) \
    if (format == 0) CALL(FORMAT0);   \
    else CALL(FORMAT1);
#elif FORMATS == 3
#define FOR_FORMAT(format, CALL)        \
    if (format == 0) CALL(FORMAT0);     \
    else if (format == 1) CALL(FORMAT1); \
    else CALL(FORMAT2);
#else
#define FOR_FORMAT(format, CALL)        \
    if (format == 0) CALL(FORMAT0);     \
    else if (format == 1) CALL(FORMAT1); \
    else if (format == 2) CALL(FORMAT2); \
    else CALL(FORMAT3);
#endif
