# PAGEDATTN_VERSION, the numbers alone, for CMake; PAGEDATTN_VERSION_FULL, the whole string, for pa_version().
# A Python build takes both from the package's metadata.  A plain CMake build has no metadata: it takes the release
# that the tree leads up to.
if(SKBUILD)
  set(PAGEDATTN_VERSION ${SKBUILD_PROJECT_VERSION})
  set(PAGEDATTN_VERSION_FULL ${SKBUILD_PROJECT_VERSION_FULL})
else()
  set(PAGEDATTN_VERSION 0.1.0)
  set(PAGEDATTN_VERSION_FULL ${PAGEDATTN_VERSION})
endif()
